"""A catalogue made searchable: embedded into a LanceDB table, and asked by words, photo or region.

embed/       `eclip embed`: a catalogue into an index
query/       an index asked: `Searcher`, in Python and for the server
report/      answers as a table, a page, a picture
__main__.py  `eclip search`
check.py     does an index find what evaluation finds?
"""
