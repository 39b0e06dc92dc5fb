"""Who may do what, in the metadata database: functions of a connection, by idea; `store` puts them together."""
