"""What hf_glu uses of other libraries without their promise to keep it: every such name, and nothing else, is here.

A name is a `hf_glu.compat.private.Private`, a row of a table: what it is looked up in, which feature needs it, the
versions that have it. It is looked up when the feature is used, so that a library that has renamed it costs that
feature and no other. The rest of hf_glu imports rows, never such names (``tests/compat/test_private.py``).
"""
