-- Gets manifests by tag all over a large store. Arguments: Accept, how many repositories, how many tags in each;
-- an If-None-Match, if any.
local headers, repositories, tags

function init(args)
  headers = { ["Accept"] = args[1], ["If-None-Match"] = args[4] }
  repositories, tags = tonumber(args[2]), tonumber(args[3])
  math.randomseed(7)
end

function request()
  local path = string.format("/v2/r/%06d/manifests/t%d", math.random(0, repositories - 1), math.random(0, tags - 1))
  return wrk.format("GET", path, headers)
end
