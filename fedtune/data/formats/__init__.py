"""Readers and writers of data sets; each module is for one form."""
