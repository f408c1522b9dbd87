"""The store that the target's hidden states lie in: format, writer, reader, check."""

from drafthead.states.dataset import Samples
from drafthead.states.format import Encoding, Sample, StoreMeta
from drafthead.states.reader import StateReader
from drafthead.states.writer import StateWriter

__all__ = ["Encoding", "Sample", "Samples", "StateReader", "StateWriter", "StoreMeta"]
