"""Analyses of base weights and of what runs made of them; nothing here trains."""
