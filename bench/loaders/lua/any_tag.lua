-- Gets manifests by random tags of repositories all over a large store. Arguments: Accept, the number of repositories,
-- the step between their numbers, and the number of tags in each. Optional arguments: If-None-Match (or an empty text),
-- and the milliseconds that a connection waits after a response before it sends the next request.
local headers, repositories, step, tags

function init(args)
  headers = { ["Accept"] = args[1], ["If-None-Match"] = args[5] ~= "" and args[5] or nil }
  if args[6] then
    function delay() return tonumber(args[6]) end
  end
  repositories, step, tags = tonumber(args[2]), tonumber(args[3]), tonumber(args[4])
  math.randomseed(7)
end

function request()
  local repository, tag = math.random(0, repositories - 1) * step, math.random(0, tags - 1)
  return wrk.format("GET", string.format("/v2/r/%06d/manifests/t%d", repository, tag), headers)
end
