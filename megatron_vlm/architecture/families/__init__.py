"""Families of published models: their parts, tokens and templates; and refused ones, with reasons."""
