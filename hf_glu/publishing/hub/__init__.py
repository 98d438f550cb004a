"""Pushing to the Hub: staging, checking, uploading, and the code that goes along."""
