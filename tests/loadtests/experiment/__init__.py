"""Tests of loadtests/experiment."""
