"""The web pages below `/ui`. The server renders them in English and Chinese, and they also work without JavaScript.

They use the objects of the management API and the `Registry` interface, and never access the store directly
(docs/adr/0018-pages.md)."""
