"""One fault after the other on a real service process: is anything lost, and does it recover?"""
