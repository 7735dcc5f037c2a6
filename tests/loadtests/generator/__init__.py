"""Tests of loadtests/generator."""
