"""The sketch: K classes in B buckets, R times; what that costs, and the way from bucket scores back to classes.

Nothing here knows of data, networks or files.
"""
