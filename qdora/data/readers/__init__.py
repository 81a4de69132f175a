"""Readers: local files and hub datasets as rows that know where they came from."""
