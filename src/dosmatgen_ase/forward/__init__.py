"""The forward model: structure -> site DOS."""
