"""Whether a store answers, asked with little time and no engine: importing one takes longer than a dead server should."""

from __future__ import annotations

import http.client
import os
import socket
import sqlite3
import ssl
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

PROBE_S = 1.5
"""Patience for the connection, and again for the first byte of an answer."""
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def probe(uri: str) -> str | None:
    """What is wrong with the store at an address, in words that hold none of it; None when it answers.

    Any answer counts, an error too: what it means is left to the client. So is an address of a kind not known here.
    """
    scheme = uri.partition(":")[0].partition("+")[0].lower()
    try:
        if scheme in ("http", "https"):
            _ask_http(uri)
            return None
        if scheme == "sqlite":
            return _ask_sqlite(uri.partition(":///")[2].partition("?")[0])
        if scheme in DATABASE_PORTS:
            parts = urlsplit(uri)
            with socket.create_connection(
                (parts.hostname or "localhost", parts.port or DATABASE_PORTS[scheme]), PROBE_S
            ):
                return None
    except TimeoutError:
        return "no answer in time"
    except ssl.SSLError:
        return None  # it answers; whether it may be trusted is the client's to say
    except (OSError, http.client.HTTPException) as error:
        return getattr(error, "strerror", None) or type(error).__name__
    except ValueError:
        return "not an address"
    return None


def _ask_http(uri: str) -> None:
    parts = urlsplit(uri)
    host = parts.hostname or ""
    if parts.scheme in getproxies() and not proxy_bypass(host):
        return
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(host, parts.port, timeout=PROBE_S, context=_make_trusting())
    else:
        connection = http.client.HTTPConnection(host, parts.port, timeout=PROBE_S)
    with closing(connection):
        connection.request("GET", f"{parts.path.rstrip('/')}/health")
        connection.getresponse()


def _make_trusting() -> ssl.SSLContext:
    """Nothing secret is sent here, and the client may have authorities of its own."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _ask_sqlite(name: str) -> str | None:
    path = Path(name)
    if not path.exists():
        there = next(folder for folder in path.absolute().parents if folder.exists())
        return None if there.is_dir() and os.access(there, os.W_OK) else f"{there} is no folder that can be written"
    try:
        with closing(sqlite3.connect(path, timeout=PROBE_S, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        return str(error)
    return None
