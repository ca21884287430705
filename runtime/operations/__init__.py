"""The commands around the controller: ``up``, ``status``, ``scale``, ``drain``, ``update``, ``logs``, ``down``.

    deployment.py  from a cluster file to what is wanted (pure)
    changes.py     what a new wish changes, in words (pure)
    progress.py    what has happened between two looks, and whether all is as wanted (pure)
    status.py      how a deployment is, with or without its controller
    follow.py      look again until it is as wanted, or cannot become so
    up.py  change.py  down.py  logs.py    the commands
    reporter.py  screen.py                how they show what they see
    reach.py       which Ray
    commands.py    the command line's arguments

They see a cluster through an ``Operator``. Nothing here is on a request's way, and nothing that runs needs a command
to stay.
"""
