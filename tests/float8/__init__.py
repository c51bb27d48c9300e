"""Exported programs and the command line."""
