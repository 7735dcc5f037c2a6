"""Tests of service/scheduling."""
