"""Key material of the network services: received, checked, kept in memory until its end.

What an agent pushes goes down this list:

* receive.py      the order in which envelopes take effect: withdrawn, recorded, relayed, installed
* sessions.py     who may push, and whose signature counts
* envelopes.py    what one envelope is worth; former.py: sealed to a certificate that was renewed meanwhile
* push_audit.py   what is recorded of it, and how long that may take
* relay.py        the same envelopes for the proxy's other processes
* cache.py        all keys, each until its deadline; what the proxy asks for keys
* slot.py         one network service's keys: which may be installed, what is told of them
* data_key.py     one key: what is derived from it, and how it ends
"""
