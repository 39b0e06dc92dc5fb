-- Gets manifests by tag at random, all over a large store. Arguments: Accept, of how many repositories, how many there
-- are from one to the next, how many tags in each; an If-None-Match, if any.
local headers, repositories, step, tags

function init(args)
  headers = { ["Accept"] = args[1], ["If-None-Match"] = args[5] }
  repositories, step, tags = tonumber(args[2]), tonumber(args[3]), tonumber(args[4])
  math.randomseed(7)
end

function request()
  local repository, tag = math.random(0, repositories - 1) * step, math.random(0, tags - 1)
  return wrk.format("GET", string.format("/v2/r/%06d/manifests/t%d", repository, tag), headers)
end
