"""Modules for use with other packages; each is imported by itself and needs the package that it is named after."""
