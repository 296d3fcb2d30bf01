"""Readers and writers of data sets, a module a form."""
