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
 * The first process of a guest: it writes numbers to pages of its memory, some
 * of them often and some seldom, and says which page has not kept its number.
 * There is one process, so that nothing empties the processor's TLB for long.
 */
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <time.h>

#define PAGES 4096
#define SIZE 4096UL

static uint32_t wanted[PAGES];

int main(void)
{
	uint64_t random = 88172645463325252ULL, lost = 0;
	time_t last = 0;
	char *area = mmap(NULL, PAGES * SIZE, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	setvbuf(stdout, NULL, _IOLBF, BUFSIZ);
	for (;;) {
		for (int i = 0; i < 200; i++) {
			random ^= random << 13;
			random ^= random >> 7;
			random ^= random << 17;
			/* One of the first 16, 32, ... 4096 pages. */
			unsigned among = 1u << (4 + (random >> 40) % 9);
			unsigned page = (random >> 8) & (among - 1);
			volatile uint32_t *there = (volatile uint32_t *)(
				area + page * SIZE + page % 64 * 64);

			if (*there != wanted[page] && lost++ < 40)
				printf("LOST page %u has %u, not %u\n",
				       page, *there, wanted[page]);
			*there = ++wanted[page];
			for (volatile int wait = 0; wait < 50; wait++)
				;
		}
		struct timespec now;

		clock_gettime(CLOCK_MONOTONIC, &now);
		if (now.tv_sec != last) {
			last = now.tv_sec;
			printf("ALIVE %llu lost\n", (unsigned long long)lost);
		}
	}
}
