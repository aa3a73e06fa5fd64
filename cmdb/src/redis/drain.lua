-- Keeps the operator's last word about a host.
-- KEYS: the hash of these words. ARGV: the host; '1': to be empty, '0': not; the word's stamp; '1' if it is a new word, which
--       gets a stamp above every other one's.
-- Returns the word that holds now.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local have = redis.call('HGET', KEYS[1], ARGV[1]) or ''
local last = tonumber(string.match(have, '^[01] (%d+)$')) or 0
local stamp = tonumber(ARGV[3])
if ARGV[4] == '1' then stamp = math.max(now, last + 1, stamp + 1) end
if stamp <= last then return have end
local word = ARGV[2] .. ' ' .. string.format('%d', stamp)
redis.call('HSET', KEYS[1], ARGV[1], word)
return word
