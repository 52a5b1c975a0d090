"""What of the paper can be checked on a small machine, a module a page.

``run()`` measures and returns plain data, which is kept as JSON. From that,
``answer(found)`` tells in a sentence what came out, ``page(found)`` writes
the rest of the page in Markdown, and ``plot(found, path)`` its picture.
"""
