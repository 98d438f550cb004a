"""A page to play on: a model's gates on one's own text, moved by sliders, beside another model or the same unsteered.

`settings` makes a modulation of what sliders say, `reading` numbers of a text, `tables` HTML of numbers, `playing` puts
the three together, `page` is gradio's page of it, `serving` puts that on a port, and `space` into a folder for the Hub.
"""
