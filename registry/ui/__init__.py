"""The pages for people, below `/ui`: rendered by this server, in English and Chinese, without JavaScript or with it.

They stand on the management API's objects and on the `Registry` interface, and never on the store
(docs/adr/0018-pages.md)."""
