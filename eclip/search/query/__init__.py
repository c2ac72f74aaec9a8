"""An index asked by words, by photo, by a region of a photo, or by words and a photo together.

    from eclip.search.query import Query, Searcher
    answer = Searcher.open("index").search(Query(words="red armchair"))

query.py       what is asked and what is answered: Query, Filters, Answer, Hit
searcher.py    `Searcher`: a question from its check to its hits; the map of a call
asking.py      words and photos to a vector and the column that it is compared with
table.py       the LanceDB table: opening it, nearest vectors, full text, rows
filters.py     filters as SQL, quoted; what is said of names that are not in the catalogue
facets.py      what can be filtered by
fusion.py      images of one product folded, two rankings fused
matching.py    what takes the model once more: hits put in order by the matching head, words found in their pictures
"""

from eclip.search.query.query import Answer, Filters, Hit, Query
from eclip.search.query.searcher import Prepared, Searcher
from eclip.search.query.table import NoSuchImage, UnreadableIndex

__all__ = ["Answer", "Filters", "Hit", "NoSuchImage", "Prepared", "Query", "Searcher", "UnreadableIndex"]
