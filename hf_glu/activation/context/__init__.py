"""What an activation may read besides its input: which tokens count, where texts begin, and states in the cache."""

from hf_glu.activation.context.hooks import unwatch_context, watch_context
from hf_glu.activation.context.reader import Reader
from hf_glu.activation.context.reading import Reading

__all__ = ["Reader", "Reading", "unwatch_context", "watch_context"]
