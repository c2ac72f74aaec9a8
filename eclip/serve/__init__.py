"""The search page and its API (`eclip serve`), over an index that `eclip embed` wrote.

    eclip serve --index INDEX --port 8000

app.py            `create_app`: the routes
docs.py           what they take and give, as OpenAPI and as a plain page
guard.py          around every route: sizes, hosts, headers, errors as JSON, one line of log
limits.py         how much a client may ask for, and `Refusal`, the way to say no
forms.py          a request's fields, of a form or of JSON, checked
asked.py          those fields to a question
answers.py        answers to JSON
service.py        the model and the index behind the routes
batching.py       questions of many clients in one pass of the model
decoding.py       photos decoded in processes that can be killed
decode_worker.py  such a process
page/             what a browser shows: HTML, JavaScript and CSS
"""
