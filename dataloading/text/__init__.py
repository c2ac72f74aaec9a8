"""Titles to ids, by WordPiece; text -> pieces -> ids:
vocabulary.py     a BERT vocab.txt, read and checked
wordpiece.py      `WordPiece`: a vocabulary learnt or read, and titles as packed ragged batches
"""

from .vocabulary import SPECIALS, read_vocabulary
from .wordpiece import WordPiece

__all__ = ["SPECIALS", "WordPiece", "read_vocabulary"]
