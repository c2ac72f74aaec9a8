"""An answer as a reader sees it.

lines.py    a table on the terminal
page.py     one HTML file that needs nothing else
sheet.py    a picture (PNG)
shown.py    what all of them show: pictures with boxes, lines of text
"""

from eclip.search.report.lines import format_answer
from eclip.search.report.page import write_page
from eclip.search.report.sheet import write_sheet
from eclip.search.report.shown import Shown, gather

__all__ = ["Shown", "format_answer", "gather", "write_page", "write_sheet"]
