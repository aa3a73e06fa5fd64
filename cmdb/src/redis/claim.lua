-- Takes a server-name for an app, or gives it back.
-- KEYS: the name's key, which holds "app|when it was claimed (ms)".
-- ARGV: the app; an owner that does not use the name ('': none), which loses it if it claimed it long ago; '1' to take or
--       '0' to give back; how long ago that is (ms).
-- Returns whose the name is now.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local owner, since = string.match(redis.call('GET', KEYS[1]) or '', '^(.*)|(%d+)$')
if ARGV[3] == '0' then
    if owner == ARGV[1] then redis.call('DEL', KEYS[1]) end
    return ''
end
local left = owner == ARGV[2] and now - (tonumber(since) or 0) > tonumber(ARGV[4])
if owner and owner ~= ARGV[1] and not left then return owner end
redis.call('SET', KEYS[1], ARGV[1] .. '|' .. string.format('%d', now))
return ARGV[1]
