"""Reads the HTML pages of evaluations."""

import html.parser

VOID = {"meta", "img", "br", "wbr"}


class Page(html.parser.HTMLParser):
    """Elements as (name, attributes), the visible text, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self._open = [], [], []
        self.feed(text)
        self.close()
        assert not self._open
        self.text = " ".join(self.words)

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self._open.append(name)

    def handle_endtag(self, name):
        assert self._open.pop() == name

    def handle_data(self, text):
        if self._open and self._open[-1] != "style":
            self.words.append(text)

    def all(self, name, class_=None):
        return [
            a
            for n, a in self.elements
            if n == name and (class_ is None or class_ in (a.get("class") or "").split())
        ]


def read(path):
    return Page(path.read_text(encoding="utf-8"))
