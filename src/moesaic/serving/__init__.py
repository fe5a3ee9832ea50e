"""HTTP: an OpenAI-compatible server around an engine that runs in a process of its own.

    client --HTTP--> app --Session--> [socket, msgpack] --> worker: Engine.step()

The engine has its own process, not a thread: its loop is Python, so requests parsed, tokenised and streamed beside it
would take the interpreter lock from between two kernels; and a fault that kills the engine leaves somebody alive to
tell the clients. The two exchange plain values in msgpack; nothing is pickled.
"""
