"""One module a format; each returns a `TargetDOS`. `file` tells the format of a file by its content.

To add a reader: a function of (`common.Content`, `common.Request`) here, and a line in the table `file.FORMATS`. What
the file does not say and the reader takes for granted goes into the provenance: `common.record`.
"""
