-- The periods in which a server recorded pulls. In all other times, nobody could pull. Times are seconds since 1970.
CREATE TABLE recorded_period (
    start REAL PRIMARY KEY,
    until REAL NOT NULL
) STRICT, WITHOUT ROWID;
-- Earlier versions did not record when they ran. The time of their newest pull, change of a tag or activity shows until
-- when they did.
INSERT INTO recorded_period (start, until)
SELECT 0.0, seen FROM (
       SELECT max(at) AS seen FROM (
              SELECT max(last) AS at FROM manifest_pull WHERE pulls > 0 AND last <= unixepoch('subsec')
              UNION ALL SELECT max(at) FROM tag_history WHERE at <= unixepoch('subsec')
              UNION ALL SELECT max(start) + 0.0 FROM activity_hour WHERE start <= unixepoch('subsec')))
 WHERE seen IS NOT NULL;
