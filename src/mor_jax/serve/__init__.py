"""An HTTP server over the depth-wise batching engine, in the form of OpenAI's completions (extra ``serve``)."""
