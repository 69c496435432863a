"""`instantft watch`: reads samples and labels, predicts, notices drift, adapts, and never gets worse for it.

detectors.py   has the world changed?
journal.py     the state folder: adapters in versions, labelled samples, what is committed
loop.py        messages in, events out
sources.py     messages from lines, folders and MQTT
page.py        what is going on, over HTTP
"""
