"""Seeded generators of everything the tiny model reads: one kind of text per module."""
