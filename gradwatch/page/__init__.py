"""Recordings in, pictures and words for people out: the live page and the report."""
