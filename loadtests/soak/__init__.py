"""Many requests to one process: does its memory stay flat?"""
