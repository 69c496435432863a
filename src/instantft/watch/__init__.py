"""`instantft watch`: reads samples and labels, predicts, notices drift, adapts, and never gets worse for it.

detectors.py   has the world changed?
replay.py      samples on disk
journal.py     the state folder: adapters in versions, and what is committed
loop.py        messages in, events out
sources.py     messages from lines and folders
mqtt.py        and from MQTT
page.py        what is going on, over HTTP
"""
