/* What a build may choose. The exported C of a microcontroller brings a file of this name of its own, which also sets
 * IFT_VL and IFT_CORE; here the build does that for every instruction set (CMakeLists.txt). */
#ifndef INSTANTFT_CONFIG_H
#define INSTANTFT_CONFIG_H

enum {
    IFT_MAX_LAYERS = 32,
    IFT_CONVS = 1,           /* networks may have conv layers */
    IFT_BLOCKS = 1,          /* codecs are also told by blocks, for decoders with vectors of 16 */
    IFT_FIXED = 1,           /* the codec nf4-hw is there */
    IFT_DENSE_LEAF = 32,     /* systems up to this size are not cut further */
    IFT_DENSE_BYTES = 26624, /* workspace (64-byte aligned) of the closed form's algebra, however large its matrices */
};

#endif
