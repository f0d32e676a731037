#pragma once

void check_sequences();
