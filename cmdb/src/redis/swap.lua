-- Replaces an app's hash, or parts of it, if it is as the caller thinks it is: the one way in which anything is written.
-- What the new content is was decided by the caller's state machine; here it is only made sure that nothing came between.
-- KEYS: the app's hash.
-- ARGV: the record's revision that the caller knows, the spec's, what it takes this server's clock for (ms), how far that
--       may be off (ms), seconds after which the key expires (0: never), then pairs: field, value ('': the field goes).
-- Returns {1, this server's clock (ms)} when it was done, else {0, the clock, rev, srev, record, spec} as they are.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local have = redis.call('HMGET', KEYS[1], 'rev', 'srev', 'record', 'spec')
for i = 1, 4 do have[i] = have[i] or '' end
if have[1] ~= ARGV[1] or have[2] ~= ARGV[2] or math.abs(now - ARGV[3]) > tonumber(ARGV[4]) then
    return { '0', string.format('%d', now), have[1], have[2], have[3], have[4] }
end
for i = 6, #ARGV, 2 do
    if ARGV[i + 1] == '' then
        redis.call('HDEL', KEYS[1], ARGV[i])
    else
        redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
    end
end
if #ARGV > 5 then
    if ARGV[5] == '0' then
        redis.call('PERSIST', KEYS[1])
    else
        redis.call('EXPIRE', KEYS[1], ARGV[5])
    end
end
return { '1', string.format('%d', now) }
