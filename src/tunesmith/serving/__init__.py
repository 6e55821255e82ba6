"""A model behind OpenAI's HTTP interface: what a request may say, the steps that answer many at once, the server."""
