"""One module a format; each returns a `TargetDOS`. `file` tells the format of a file by its content.

To add a reader: a function here, and a line in `file.read_file` that knows its first bytes or keys.
"""
