/*
 * Licensed under the Apache License, Version 2.0 (the "License"); you may
 * not use this file except in compliance with the License. You may obtain
 * a copy of the License at
 *
 *      http://www.apache.org/licenses/LICENSE-2.0
 *
 * Unless required by applicable law or agreed to in writing, software
 * distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
 * WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
 * License for the specific language governing permissions and limitations
 * under the License.
 *
 * pattern SEED BYTES: write that many bytes of SHAKE128(SEED) to standard
 * output. FIPS 202, sections 3.2 and 6.2; Python has the same function as
 * hashlib.shake_128, so that a test can tell what a guest has written without
 * asking this program.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define RATE 168 /* bytes a squeeze, for SHAKE128 */

static const uint64_t ROUND[24] = {
	0x0000000000000001ULL, 0x0000000000008082ULL, 0x800000000000808aULL,
	0x8000000080008000ULL, 0x000000000000808bULL, 0x0000000080000001ULL,
	0x8000000080008081ULL, 0x8000000000008009ULL, 0x000000000000008aULL,
	0x0000000000000088ULL, 0x0000000080008009ULL, 0x000000008000000aULL,
	0x000000008000808bULL, 0x800000000000008bULL, 0x8000000000008089ULL,
	0x8000000000008003ULL, 0x8000000000008002ULL, 0x8000000000000080ULL,
	0x000000000000800aULL, 0x800000008000000aULL, 0x8000000080008081ULL,
	0x8000000000008080ULL, 0x0000000080000001ULL, 0x8000000080008008ULL,
};
static const int SHIFT[24] = { 1, 3, 6, 10, 15, 21, 28, 36, 45, 55, 2, 14,
	27, 41, 56, 8, 25, 43, 62, 18, 39, 61, 20, 44 };
static const int LANE[24] = { 10, 7, 11, 17, 18, 3, 5, 16, 8, 21, 24, 4,
	15, 23, 19, 13, 12, 2, 20, 14, 22, 9, 6, 1 };

static uint64_t rotate(uint64_t x, int n)
{
	return (x << n) | (x >> (64 - n));
}

static void permute(uint64_t a[25])
{
	for (int round = 0; round < 24; round++) {
		uint64_t c[5], t;
		for (int x = 0; x < 5; x++)
			c[x] = a[x] ^ a[x + 5] ^ a[x + 10] ^ a[x + 15] ^ a[x + 20];
		for (int x = 0; x < 5; x++) {
			t = c[(x + 4) % 5] ^ rotate(c[(x + 1) % 5], 1);
			for (int y = 0; y < 25; y += 5)
				a[y + x] ^= t;
		}
		t = a[1];
		for (int i = 0; i < 24; i++) {
			uint64_t kept = a[LANE[i]];
			a[LANE[i]] = rotate(t, SHIFT[i]);
			t = kept;
		}
		for (int y = 0; y < 25; y += 5) {
			memcpy(c, a + y, sizeof(c));
			for (int x = 0; x < 5; x++)
				a[y + x] = c[x] ^ (~c[(x + 1) % 5] & c[(x + 2) % 5]);
		}
		a[0] ^= ROUND[round];
	}
}

int main(int argc, char **argv)
{
	static char out[RATE * 390];
	uint64_t state[25] = { 0 };
	unsigned char *bytes = (unsigned char *)state;
	long long left;
	size_t length;

	if (argc != 3 || (length = strlen(argv[1])) >= RATE) {
		fprintf(stderr, "usage: pattern SEED BYTES\n");
		return 2;
	}
	left = atoll(argv[2]);
	memcpy(bytes, argv[1], length);
	bytes[length] = 0x1f;
	bytes[RATE - 1] ^= 0x80;
	while (left > 0) {
		size_t filled = 0;
		while (filled < sizeof(out)) {
			permute(state);
			memcpy(out + filled, bytes, RATE);
			filled += RATE;
		}
		if ((long long)filled > left)
			filled = left;
		for (size_t at = 0; at < filled;) {
			ssize_t n = write(1, out + at, filled - at);
			if (n <= 0)
				return 1;
			at += n;
		}
		left -= filled;
	}
	return 0;
}
