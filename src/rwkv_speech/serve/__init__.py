"""A model behind HTTP: the forms of OpenAI's API, live sessions over websockets, and a page for the browser."""
