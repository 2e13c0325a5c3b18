"""Recordings in, words for people out."""
