"""How sparse attention gets into other people's models: one file a host library.

No file imports its host before it is asked to, so all of them can be imported without any.
"""
