"""Drives the Python client and worker runtime of awa for the benchmark: the driver talks to it in lines of JSON.

    awa_client.py PACKAGE URL migrate
    awa_client.py PACKAGE URL run QUEUE IN_FLIGHT

To us:    {"call": 7, "enqueue": ["0000000000000001", ...]}, {"complete": ["0000000000000001", ...]}
From us:  {"ready": true}, {"call": 7}, {"claimed": "0000000000000001"}, and at the end {"drained": [...]}

A job is claimed when its handler starts. The handler returns when the driver completes the job, and the runtime then makes that
durable in its own time. At the end of our input, the handlers that still wait return too, and are named as drained.
"""

import asyncio
import json
import sys
from dataclasses import dataclass

sys.path.insert(0, sys.argv[1])
import awa  # noqa: E402


@dataclass
class Bench:
    n: str
    to: str = "someone@example.org"
    template: str = "welcome"
    locale: str = "en"
    again: bool = True


def say(**what):
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


async def enqueue(client, queue, call, numbers):
    jobs = [Bench(n=number) for number in numbers]
    if len(jobs) == 1:
        await client.insert(jobs[0], queue=queue)
    else:
        await client.enqueue_many_copy(jobs, queue=queue)
    say(call=call)


async def run(url, queue, in_flight):
    client = awa.AsyncClient(url, max_connections=24)
    waiting, drained, ended = {}, [], asyncio.Event()

    @client.task(Bench, queue=queue)
    async def handle(job):
        number = job.args.n
        if ended.is_set():
            drained.append(number)
            return
        done = asyncio.get_running_loop().create_future()
        waiting[number] = done
        say(claimed=number)
        await done

    await client.start([(queue, in_flight)], poll_interval_ms=50)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    say(ready=True)
    calls = set()
    while line := await reader.readline():
        told = json.loads(line)
        if "enqueue" in told:
            call = loop.create_task(enqueue(client, queue, told["call"], told["enqueue"]))
            calls.add(call)
            call.add_done_callback(calls.discard)
        for number in told.get("complete", []):
            waiting.pop(number).set_result(None)
    ended.set()
    for number, done in waiting.items():
        drained.append(number)
        done.set_result(None)
    await client.shutdown(timeout_ms=10_000)
    await client.close()
    say(drained=drained)


async def migrate(url):
    client = awa.AsyncClient(url)
    await client.migrate()
    await client.close()


if sys.argv[3] == "migrate":
    asyncio.run(migrate(sys.argv[2]))
else:
    asyncio.run(run(sys.argv[2], sys.argv[4], int(sys.argv[5])))
